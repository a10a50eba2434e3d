"""Does it train as well? Experiments with paired seeds; README.md beside this says how to run them."""
