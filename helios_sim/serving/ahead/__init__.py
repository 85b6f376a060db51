"""Many iterations of one replica at once, compiled, up to the next moment at which only Python can go on.

The steps say again, one iteration at a time and on arrays, what `serving.scheduler`, `serving.commit`, `serving.server`
and `serving.decider` say on objects and for many iterations: compiled code takes no objects, and the others have to
serve every engine. Tests hold both to the same bits.
"""
