"""What `make assignments` and nbgrader read in the course folder, to which it is copied beside `source`."""

c = get_config()  # noqa: F821  (nbgrader defines it)

c.CourseDirectory.course_id = "coneslab"
c.Execute.timeout = 600  # seconds for one cell; a whole assignment takes a minute or two
c.Execute.interrupt_on_timeout = True  # a student's endless loop costs that cell alone
