"""A page on loopback on which one speaks to a model: sound in, the answer as it is written, and what the text LLM says beside it.

`run_folder` finds what there is to offer, `clips` keeps the sounds, `voices` answers, `line` lets one at a time, `server` talks HTTP.
"""
