"""A report, shown: in the terminal, as Markdown, as HTML, and the schema of its JSON.

`_facts` decides what is said, `_format` how a number reads; the renderers only lay it out.
No framework is imported here.
"""
