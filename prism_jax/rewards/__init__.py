"""Rule-based rewards: segments, answer judge, scores."""
