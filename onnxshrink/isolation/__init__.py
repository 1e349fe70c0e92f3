"""Models opened and run in a child process, so that a crash of onnxruntime is not ours.

``host.SessionHost`` is the parent's side, ``worker`` the child's, ``wire`` what goes
between. Nothing is imported here: the child is to be there soon.
"""
