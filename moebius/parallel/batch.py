"""Which rows of a batch a process works on, and in how many micro-batches."""


def row_ranges(
    num_rows: int, micro_batch_size: int, index: int, count: int
) -> list[tuple[int, int]]:
    """(start, end) of the micro-batches of one of `count` data-parallel processes.

    The first `num_rows % count` processes have a row more. All have equally many micro-batches,
    since they communicate in each; where rows do not suffice one is empty.
    """
    each, more = divmod(num_rows, count)
    start = index * each + min(index, more)
    end = start + each + (index < more)
    number = -(-max(each + (more > 0), 1) // micro_batch_size)
    return [
        (min(start + i * micro_batch_size, end), min(start + (i + 1) * micro_batch_size, end))
        for i in range(number)
    ]
