"The paper's rows, statistics, figures and tables. The engine (`xcl.*`) never imports this package."
