from benchmarks.faultdrill import crash_points as c, table
import sys
from benchmarks.faultdrill.suite import Case
import functools
def main():
    want=sys.argv[1].split(","); variants=sys.argv[2].split(",")
    n=bad=0
    for w,r in c.ours():
        if w not in want: continue
        for p in c.points([(w,r)]):
            if p.variant not in variants: continue
            n+=1
            problem,judged=table.in_a_directory(Case(p.name,functools.partial(c.strike,p,"")))
            if problem: bad+=1; print(p.name,problem[:300],flush=True)
    print(n,bad)
if __name__=="__main__": main()
