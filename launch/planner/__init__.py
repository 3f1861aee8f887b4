"""What a run will need, from the run's own code on tensors without numbers. Start reading at stages.py and
ledger.py.
"""
