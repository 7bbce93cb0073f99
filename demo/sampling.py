"""Generate and teach in a browser:

streamlit run demo/sampling.py
streamlit run demo/sampling.py -- --folder /data/models --runs /data/runs
"""

import sys
from pathlib import Path

import streamlit as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Streamlit puts the script's own folder there alone.

from demo import sample_page, session, teach_page

st.set_page_config(page_title="dreambooth_ms", page_icon=":material/brush:", layout="wide")
session.check_server()
session.PAGES = {
    "sample": st.Page(sample_page.show, title="Generate", icon=":material/brush:", default=True),
    "teach": st.Page(teach_page.show, title="Teach", icon=":material/school:", url_path="teach"),
}
page = st.navigation(list(session.PAGES.values()), position="top")
with st.container(key="narrow", horizontal=True):  # Where the bar at the top has no room for them.
    for link in session.PAGES.values():
        st.page_link(link)
page.run()
