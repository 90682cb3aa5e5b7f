"""The audit of a federation: how much of its clients' data the updates give away.

observe.py      observations: what an adversary sees, and nothing else
simulate.py     synthetic first rounds; those of a run are kept by rounds/captures.py
attacks/        one attack a file, named after its paper; base.py: what an attack is
plan.py         attacks by name, their settings and budgets
cells.py        settings under audit: sweeps, captured rounds
remedies.py     runs with a defence switched on
examine.py      the loop over cells, which can be stopped and gone on with
scoring.py      the comparison with the truth; metrics.py has the numbers
inspection.py   signs of a model that was made to leak
results.py      the results, as audit.json holds them
report.py       audit.json and audit.html; tables.py, words.py, advice.py, figures.py
command.py      the command `fedcore audit`
"""
