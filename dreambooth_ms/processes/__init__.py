"""Several processes that train as one: who they are, what they tell each other on the host, and how they end together.

What they compute together goes through MindSpore's collective operations (`ops.parallel`); what is said here is small.
"""
