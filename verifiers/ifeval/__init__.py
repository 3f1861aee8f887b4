"""Instructions and constraints that a program can check.

google.py      IFEval: a row of instructions and its verdict; google_rules.py the 25 instructions
tulu.py        the 25 constraint functions of Tülu 3's RLVR, which its rows call 'ifeval'
arguments.py   the arguments of a constraint against the annotations of its rule
sentences.py   sentences and words of English text; language.py which language a text is written in
"""
