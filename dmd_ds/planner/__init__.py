"""What a run will need, from its sizes alone: memory a GPU (`memory`), bytes moved and seconds a step (`cost`), on paper."""
