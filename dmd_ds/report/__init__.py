"""One page about one run or several, in a file that needs nothing else: read a run's folder, lay out its curves, fill the page."""
