"""Several processes that train one model: who they are, what they exchange on the host, and how all of them end.

What they compute as one goes through MindSpore's collective operations (`runtime.collective`); what is sent is small.
"""
