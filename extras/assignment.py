"""Units and phones one to one, for that track of DiscoPhon; without SciPy."""

import numpy as np


def assignment(score):
    """The row of each column in the one-to-one assignment with the largest sum of a square matrix.

    Rows are added one by one, each along the shortest augmenting path (Crouse, 2016). Of equally
    short ones it takes that of scipy.optimize.linear_sum_assignment, and so of DiscoPhon.
    """
    size = len(score)
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for new in range(size):
        path, came_from = np.full(size, np.inf), np.full(size, -1)
        row, shortest, columns, reached = new, 0.0, np.arange(size)[::-1].copy(), []
        while row >= 0:
            cost = shortest - score[row, columns] - row_price[row] - column_price[columns]
            better = cost < path[columns]
            path[columns[better]], came_from[columns[better]] = cost[better], row
            shortest = path[columns].min()
            equal = np.flatnonzero(path[columns] == shortest)
            free = equal[row_of[columns[equal]] < 0]
            at = free[-1] if len(free) else equal[0]
            column = columns[at]
            columns[at], columns = columns[-1], columns[:-1]
            reached.append(column)
            row = row_of[column]
        row_price[new] += shortest
        row_price[row_of[reached[:-1]]] += shortest - path[reached[:-1]]
        column_price[reached] -= shortest - path[reached]
        while row != new:  # along the path back, each row takes the column that it came to
            row = row_of[column] = came_from[column]
            column_of[row], column = column, column_of[row]
    return row_of
