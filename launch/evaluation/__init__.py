"""What launch.evaluate and launch.compare are made of: examples before the question (few_shot.py), sampling and judging
(answers.py), the file of responses (file.py), what is measured (results.py) and how it is shown (table.py).
"""
