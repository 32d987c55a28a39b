"""What evaluation, training and a look at a data set show people: charts, pictures with boxes, one page of HTML."""
