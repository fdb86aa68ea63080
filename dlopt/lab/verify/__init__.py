"""`dlopt verify`: checks an optimizer's updates against its paper, and its behaviour (resume, precision, cost).

cases.py holds the cases, each a few lines of plain PyTorch; checks.py runs them and names the checks.
references.py holds the updates of papers in NumPy, which dlopt's own tests compare its optimizers with, and methods.py
the hyperparameters and defaults that belong to them; paper_check.py compares an optimizer with them. subject.py builds
an optimizer and finds out how to drive it.
"""
