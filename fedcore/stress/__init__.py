"""The stress test: what each aggregation rule keeps of a model under each attack.

`plan.py` lists the cells, one rule against one attack each; `examine.py` runs them,
each as an ordinary run; `results.py` has the numbers, and `tables.py`, `figures.py`,
`words.py` and `report.py` show them. Formulas and sources: docs/hostile.md.
"""
