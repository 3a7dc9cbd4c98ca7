"""Pictures of masked clips, the adaptivity figure and the HTML report of a run."""
