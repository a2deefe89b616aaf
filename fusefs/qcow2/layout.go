// What each cluster of the image is in the file.

package qcow2

import "sort"

// counts are how many tables and data clusters a file has.
type counts struct {
	entries      int64 // of a table
	tables, data int64
	next         int64 // the first table in the L1 table that is not counted yet
}

// add counts a span behind those counted before.
func (c *counts) add(s span) {
	first, next := s.from/c.entries, (s.to-1)/c.entries+1
	c.tables += next - max(first, c.next)
	c.next = next
	if s.kind == data {
		c.data += s.to - s.from
	}
}

// layout holds the kinds of all clusters. It does not change once it is filled.
type layout struct {
	counts
	stretches []stretch
}

// stretch is neighbouring tables of clusters of one kind, or one table of several
// kinds. The tables between two stretches are not in the file: all in them is
// absent.
type stretch struct {
	first  int64 // index of its first table in the L1 table
	tables int64 // tables of the file before it
	data   int64 // data clusters of the file before it

	kind           kind   // data, zero or mixed
	dataAt, zeroAt bitmap // if mixed: which entries are this; nil: none
}

// stretchMemory is what a stretch is counted with, in bytes: a slice that grew
// can have a quarter more room than it needs.
const stretchMemory = 80 * 5 / 4

// add adds a span behind those added before. take is asked before memory is used;
// after an error the layout is of no use.
func (l *layout) add(s span, take func(n int64) error) error {
	for s.from < s.to {
		piece := s
		table, entry := s.from/l.entries, s.from%l.entries
		var err error
		if whole := (s.to - s.from) / l.entries; entry == 0 && whole > 0 {
			piece.to = s.from + whole*l.entries
			err = l.begin(table, s.kind, take)
		} else {
			piece.to = min(s.to, s.from-entry+l.entries)
			err = l.addPart(table, entry, entry+piece.to-piece.from, s.kind, take)
		}
		if err != nil {
			return err
		}
		l.counts.add(piece)
		s.from = piece.to
	}
	return nil
}

// begin begins a stretch at a table.
func (l *layout) begin(table int64, k kind, take func(n int64) error) error {
	if err := take(stretchMemory); err != nil {
		return err
	}
	l.stretches = append(l.stretches, stretch{first: table, tables: l.tables, data: l.data, kind: k})
	return nil
}

// addPart adds the entries [from, to) of a table.
func (l *layout) addPart(table, from, to int64, k kind, take func(n int64) error) error {
	if table >= l.next {
		if err := l.begin(table, mixed, take); err != nil {
			return err
		}
	}
	s := &l.stretches[len(l.stretches)-1]
	set := &s.dataAt
	if k == zero {
		set = &s.zeroAt
	}
	if *set == nil {
		if err := take(l.entries / 8); err != nil {
			return err
		}
		*set = newBitmap(l.entries)
	}
	set.add(from, to)
	return nil
}

// find returns the last stretch for which begins is true, which it is for the
// first ones and for no others, and how many tables there are up to its end. The
// stretch is nil if there is none.
func (l *layout) find(begins func(s *stretch) bool) (s *stretch, end int64) {
	i := sort.Search(len(l.stretches), func(i int) bool { return !begins(&l.stretches[i]) })
	switch i {
	case 0:
		return nil, 0
	case len(l.stretches):
		return &l.stretches[i-1], l.tables
	}
	return &l.stretches[i-1], l.stretches[i].tables
}

// table returns how many tables of the file are before the one at index in the L1
// table, and whether that is in the file.
func (l *layout) table(index int64) (n int64, ok bool) {
	s, end := l.find(func(s *stretch) bool { return s.first <= index })
	if s == nil {
		return 0, false
	}
	n = s.tables + index - s.first
	return n, n < end
}

// cluster returns the cluster of the image that is the n-th data cluster of the
// file, counted from 0, and how many from there on follow each other in both.
func (l *layout) cluster(n int64) (first, count int64) {
	// Of several with as many before them only the last one has data.
	s, end := l.find(func(s *stretch) bool { return s.data <= n })
	n -= s.data
	if s.kind == data {
		return s.first*l.entries + n, (end-s.tables)*l.entries - n
	}
	entry := s.dataAt.nth(n)
	return s.first*l.entries + entry, s.dataAt.gap(entry) - entry
}

// kindOf returns the kind of an entry of any table of the stretch.
func (s *stretch) kindOf(entry int64) kind {
	switch {
	case s.kind != mixed:
		return s.kind
	case s.dataAt.has(entry):
		return data
	case s.zeroAt.has(entry):
		return zero
	}
	return absent
}

// before returns how many data clusters of the file are before an entry of its
// n-th table, which is in the stretch.
func (s *stretch) before(n, entry, entries int64) int64 {
	switch s.kind {
	case data:
		return s.data + (n-s.tables)*entries + entry
	case zero:
		return s.data
	}
	return s.data + s.dataAt.below(entry)
}
