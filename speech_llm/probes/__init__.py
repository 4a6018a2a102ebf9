"""Probes: what the model can still do, asked while it learns.

    before anything is trained   the base LLM's own rates                       train/probes/base.json
    before the first step, after the warm-up, after every epoch (or every n steps), at the end: the model as it is then

In: a recipe (`eval.probes`) and a run's described test clips. Out: for each probe a few series of figures, each with n and a 95 %
interval. What is asked is fixed by the recipe; nothing is drawn by chance and the loop gives the random state back, so a run with
probes ends in the same weights as one without.

Without sound, a frozen LLM whose adapters act only where there is sound is the base LLM: its text figures are the base's and are
not measured again.
"""

from speech_llm.probes.run import Probes, make_probes, read_probes

__all__ = ["Probes", "make_probes", "read_probes"]
