"""The benchmark: what this engine costs beside a plain one, in the same run, at equal loss.

material    spoken clips and questions about them
arms        one way of training each, timed part by part, in a process of its own
run         all arms in turn and again, the table, the goals
"""
