"""The audit of an operator's own federation: what do the updates of a run give away of its clients' data?

observe.py     what an adversary sees, and nothing else; capture of a run's real updates; synthetic rounds
attack.py      what an attack is: settings, needs, reconstruction; the attacks by name
lanes.py       many reconstructions in one batch of optimisations
sme.py inverting_gradients.py dlg.py idlg.py dlfa.py analytic.py labels.py membership.py    one attack each
metrics.py     the only place where reconstructions meet the truth
examine.py     cells, attacks and scores, one after another; resumable
report.py      audit.json, audit.html
"""
