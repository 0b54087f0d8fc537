"Sphinx: notebooks as pages, from the outputs that are stored in them. Nothing is executed or fetched."

project = 'xcl'
author = copyright = 'the xcl authors'
extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_merge_streams = True
myst_heading_anchors = 4
exclude_patterns = ['**/student.md']
html_theme = 'furo'
html_title = 'xcl'
html_show_sourcelink = False
suppress_warnings = ['mystnb.unknown_mime_type']
