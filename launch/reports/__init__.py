"""The page of launch.report: what is read (runs, results), judged (verdict, health), drawn (plots) and written (page).

runs       a run's directory, however damaged, as series of numbers
catalogue  what every metric is called, its unit, and what a healthy one looks like
verdict    what was trained, whether it worked, and the commands that come next
health     rules: a run → ok, warning or bad, with a sentence that says what to do
plots      matplotlib's SVG in the page's own colours
results    tables of accuracies with intervals, and files of launch.evaluate
planned    launch.plan's figures beside the measured ones
page       page.html.jinja with page.css and page.js, in one file
"""
