"""A base model, trained on text of which no client has any.

training.py   the loop: AdamW on windows of the base text
pretrain.py   from an experiment to a base folder
command.py    the command `fedcore pretrain`
"""
