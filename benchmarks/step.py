IMPLEMENTATIONS = {}
SELECTIONS = {"cuda": (), "cpu": (), "tiny": (), "quick": ()}


class StepCase:
    pass


class StepBench:
    pass
