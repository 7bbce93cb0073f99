"""A page to generate and to teach with: `streamlit run demo/sampling.py`.

`sampling.py` and the two `*_page.py` put widgets together; what they do is in modules that know no browser: `library`
finds models, `uploads` checks files, `engine` queues requests for the process of `worker`, `training_process` starts
and follows trainings, `photographs` looks at what they are trained on, `gallery` keeps what was sampled.
"""
