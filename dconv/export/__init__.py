"""Results in the runtimes that they are for, and the FORMATs of graphs that a framework's tracer makes."""
