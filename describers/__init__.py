"""describers: sound -> textual metadata. `describers.run.describe_inputs` for many files, `describers.compose` for wording."""
