// From runs of bytes to spans of clusters.

package qcow2

import "iter"

// Run is a run of bytes that the file is to hold; what no run covers is absent.
// Zero says that it reads as zeroes. It is an alias so that others need not name
// this package.
type Run = struct {
	Off, N int64
	Zero   bool
}

// kind is what clusters of the image are in the file.
type kind uint8

const (
	absent kind = iota
	zero
	data
	mixed // of several clusters: not the same
)

// span is the clusters [from, to), which are data or zero.
type span struct {
	from, to int64
	kind     kind
}

// spans yields the clusters that runs touch, ascending and in as few spans as can
// be. The runs are ascending, disjoint and within size bytes. A cluster is zero if
// one zero run covers it, or at the end of the image what there is of it. One that
// is touched in any other way is data: the image has its bytes, whatever they are.
func spans(runs iter.Seq2[Run, error], size int64, shift uint) iter.Seq2[span, error] {
	return func(yield func(span, error) bool) {
		m := merger{yield: yield}
		for r, err := range runs {
			if err != nil {
				yield(span{}, err)
				return
			}
			if r.N > 0 && !m.run(r, size, shift) {
				return
			}
		}
		m.flush()
	}
}

// merger puts neighbouring clusters together. Its methods return false when the
// consumer has enough.
type merger struct {
	last  span // not yielded yet; empty before the first
	yield func(span, error) bool
}

func (m *merger) run(r Run, size int64, shift uint) bool {
	end := r.Off + r.N
	from, to := r.Off>>shift, (end-1)>>shift+1
	if !r.Zero {
		return m.add(span{from, to, data})
	}
	wholeFrom, wholeTo := ceil(r.Off, 1<<shift), end>>shift
	if end == size {
		wholeTo = to
	}
	return m.add(span{from, wholeFrom, data}) &&
		m.add(span{wholeFrom, wholeTo, zero}) &&
		m.add(span{wholeTo, to, data})
}

// add adds a span; to does not need to be above from. Where it begins with the
// cluster that the last one ends with, that cluster is data in both.
func (m *merger) add(s span) bool {
	s.from = max(s.from, m.last.to)
	switch {
	case s.from >= s.to:
		return true
	case s.from == m.last.to && s.kind == m.last.kind:
		m.last.to = s.to
		return true
	}
	ok := m.flush()
	m.last = s
	return ok
}

func (m *merger) flush() bool {
	return m.last.from == m.last.to || m.yield(m.last, nil)
}
