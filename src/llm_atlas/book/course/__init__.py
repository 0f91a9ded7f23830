"""The course kit: chapters as nbgrader assignments, with points and a plan by weeks.

`write_course` turns each chosen chapter into one assignment: the instructor's version with solutions and hidden
tests, and, made from it by nbgrader itself, the students' release without them. In a chapter an exercise is a
MyST directive, a cell with a blank `answer` and its check, and a solution directive; here it becomes

    NAME-answer    what the student edits; the solution in nbgrader's solution region
    NAME-check     the chapter's own check: fresh inputs, no points
    NAME-example   1 point: the smallest example, the same for everyone
    NAME-fresh     2 points, all or none: three runs of the check with seeds drawn when the notebook is graded

`mark` is what the last two call, in the kernel of a student's notebook, where neither nbgrader nor a MyST
parser is needed. Writing a course needs both: pip install ".[course]".
"""

from llm_atlas.book.course.assignment import Exercise, assignment
from llm_atlas.book.course.kit import write_course, written
from llm_atlas.book.course.marks import EXAMPLE_POINTS, FRESH_POINTS, mark
from llm_atlas.book.course.plans import PLANS, Week, prerequisites, syllabus

__all__ = [
    "EXAMPLE_POINTS",
    "FRESH_POINTS",
    "PLANS",
    "Exercise",
    "Week",
    "assignment",
    "mark",
    "prerequisites",
    "syllabus",
    "write_course",
    "written",
]
