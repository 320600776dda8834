"""The pure core: packet bytes, SA events and the time go in; verdicts and events come out."""
