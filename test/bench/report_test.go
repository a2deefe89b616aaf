package main

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		name   string
		values []float64
		want   float64
	}{
		{"odd", []float64{9, 1, 5}, 5},
		{"even", []float64{4, 1, 2, 9}, 3},
		{"one", []float64{7}, 7},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := median(tc.values); got != tc.want {
				t.Errorf("median(%v)\n got %v\nwant %v", tc.values, got, tc.want)
			}
		})
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing is %v, want NaN", got)
	}
}

func TestFormat(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 1.0471: "1.05", 85.46: "85.5", 999.4: "999", 1234567: "1,234,567", 0.0421: "0.0421"} {
		if got := format(v); got != want {
			t.Errorf("format(%v)\n got %s\nwant %s", v, got, want)
		}
	}
}

// Every line of a table has as many cells as its head, also that of a row which
// could not be measured.
func TestReportIsATable(t *testing.T) {
	r := row{name: "x", group: "g", work: "w", subjects: []subject{{name: "a"}, {name: "b"}}, aim: "2"}
	var s strings.Builder
	err := writeReport(&s, options{runs: 3, blksnap: "true"}, []result{
		{row: r, values: [][]float64{{2, 3, 4}, {1, 2, 3}}},
		{row: r, err: errors.New("a: broke\nin | two")},
	}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(s.String()) {
		if strings.HasPrefix(line, "|") {
			lines = append(lines, line)
		}
	}
	if len(lines) != 4 {
		t.Fatalf("%d lines of table, want 4:\n%s", len(lines), &s)
	}
	for _, line := range lines {
		if got, want := strings.Count(line, "|"), strings.Count(lines[0], "|"); got != want {
			t.Errorf("%d bars, want %d: %s", got, want, line)
		}
	}
	if want := "| w | requests/s | 3.00 (2.00 to 4.00) | 2.00 (1.00 to 3.00) | 1.50 | 2 |\n"; lines[2] != want {
		t.Errorf("row\n got %swant %s", lines[2], want)
	}
}

func TestBenchmarked(t *testing.T) {
	out := []byte("goos: linux\ncpu: AMD\nBenchmarkMark/1TiB/together-2 \t 100\t 46.81 ns/op\t 93.5 ns/mark\nPASS\n")
	if got, err := benchmarked(out, "ns/mark"); got != 93.5 || err != nil {
		t.Errorf("ns/mark\n got %v, %v\nwant 93.5", got, err)
	}
	if got, err := benchmarked(out, "ns/slowest"); err == nil {
		t.Errorf("ns/slowest\n got %v\nwant an error", got)
	}
}
