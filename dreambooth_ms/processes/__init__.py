"""Several processes that train one model: who they are, what they exchange on the host, and how all of them end."""
