"""Statistical instruments of an audit: pure functions from observations to readings.

``noise``: is what reaches the weights the claimed noise? ``sampling``: were the records drawn as
the accountant believes? ``contribution``: does a record move the sum by at most the clip norm, and
is it scaled as stated? ``one_run``: how much privacy loss do guesses on canaries prove?
"""
