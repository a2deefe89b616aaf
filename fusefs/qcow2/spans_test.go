package qcow2

import (
	"errors"
	"iter"
	"slices"
	"testing"
)

// each yields runs without an error.
func each(runs ...Run) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		for _, r := range runs {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func TestSpans(t *testing.T) {
	const c = 4096
	for _, tc := range []struct {
		name string
		size int64
		runs []Run
		want []span
	}{
		{"nothing", 8 * c, nil, nil},
		{"empty runs", 8 * c, []Run{{c, 0, false}, {2 * c, 0, true}}, nil},
		{"data", 8 * c, []Run{{c, 2 * c, false}}, []span{{1, 3, data}}},
		{"zero", 8 * c, []Run{{c, 2 * c, true}}, []span{{1, 3, zero}}},
		{"part of a cluster", 8 * c, []Run{{c + 512, 512, false}}, []span{{1, 2, data}}},
		{"part of a cluster is zero", 8 * c, []Run{{c + 512, 512, true}}, []span{{1, 2, data}}},
		{"zero over a boundary", 8 * c, []Run{{2*c - 512, 1024, true}}, []span{{1, 3, data}}},
		{"data over a boundary", 8 * c, []Run{{2*c - 512, 1024, false}}, []span{{1, 3, data}}},
		{"zero with ragged ends", 8 * c, []Run{{c - 512, 3 * c, true}}, []span{{0, 1, data}, {1, 3, zero}, {3, 4, data}}},
		{"zero with a ragged head", 8 * c, []Run{{c - 512, c + 512, true}}, []span{{0, 1, data}, {1, 2, zero}}},
		{"zero with a ragged tail", 8 * c, []Run{{c, c + 512, true}}, []span{{1, 2, zero}, {2, 3, data}}},
		{"neighbours of one kind", 8 * c, []Run{{0, c, false}, {c, c, false}, {3 * c, c, false}}, []span{{0, 2, data}, {3, 4, data}}},
		{"neighbours of two kinds", 8 * c, []Run{{0, c, false}, {c, c, true}, {2 * c, c, false}}, []span{{0, 1, data}, {1, 2, zero}, {2, 3, data}}},
		{"a cluster shared by data and zero", 8 * c, []Run{{0, c + 512, false}, {c + 512, 2*c - 512, true}}, []span{{0, 2, data}, {2, 3, zero}}},
		{"a cluster shared by zero and data", 8 * c, []Run{{0, c + 512, true}, {c + 512, 512, false}}, []span{{0, 1, zero}, {1, 2, data}}},
		{"a cluster shared by two zero runs", 8 * c, []Run{{0, 512, true}, {1024, c - 1024, true}}, []span{{0, 1, data}}},
		{"several runs in a cluster", 8 * c, []Run{{0, 512, false}, {1024, 512, true}, {2048, 512, false}}, []span{{0, 1, data}}},
		{"zero to the end of the image", 2*c + 512, []Run{{c, c + 512, true}}, []span{{1, 3, zero}}},
		{"zero in the last part", 2*c + 512, []Run{{2 * c, 512, true}}, []span{{2, 3, zero}}},
		{"zero in part of the last part", 2*c + 1024, []Run{{2*c + 512, 512, true}}, []span{{2, 3, data}}},
		{"zero all over one sector", 512, []Run{{0, 512, true}}, []span{{0, 1, zero}}},
		{"data to the end of the image", 2*c + 512, []Run{{c, c + 512, false}}, []span{{1, 3, data}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []span
			for s, err := range spans(each(tc.runs...), tc.size, 12) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, s)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("spans of %v\n got %v\nwant %v", tc.runs, got, tc.want)
			}
		})
	}
}

// TestSpansStop stops after each number of spans, and after an error.
func TestSpansStop(t *testing.T) {
	runs := each(Run{0, 512, true}, Run{4096, 8192, true}, Run{20480, 512, false})
	for stop := 1; stop <= 3; stop++ {
		n := 0
		for range spans(runs, 1<<20, 12) {
			if n++; n == stop {
				break
			}
		}
		if n != stop {
			t.Errorf("spans before the stop\n got %d\nwant %d", n, stop)
		}
	}
	broken := errors.New("broken")
	var last error
	for _, err := range spans(func(yield func(Run, error) bool) {
		_ = yield(Run{0, 512, false}, nil) && yield(Run{}, broken)
	}, 1<<20, 12) {
		last = err
	}
	if last != broken {
		t.Errorf("last error\n got %v\nwant %v", last, broken)
	}
}
