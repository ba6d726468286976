"""What uses the lessons and rebased/ and is imported by neither: the paper's grids, reports and benchmarks."""
