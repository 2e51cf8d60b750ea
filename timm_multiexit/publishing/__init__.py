"""From a run or a model to a folder for the Hub, with its card and license."""
