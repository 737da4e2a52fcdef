"""The evaluation of benchmarks: rules, a model that judges, scores of groups, a suite of them."""
