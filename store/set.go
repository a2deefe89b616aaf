// Sets of slots, in which neighbours are found fast.

package store

import "math/bits"

// slotSet is a set of slot indexes of one part: a bit for each in pages of
// 4,096, made when first needed, with a bit above each non-empty word and each
// non-empty page. Finding the lowest member looks at a few words, however far
// away it is, and changing a member at three.
type slotSet struct {
	pages []*setPage
	top   []uint64 // bit i: page i has members
	n     int64    // members
}

type setPage struct {
	words [64]uint64
	sum   uint64 // bit i: words[i] is not 0
}

const pageSlots = 64 * 64

func (s *slotSet) has(i int64) bool {
	p := i / pageSlots
	return p < int64(len(s.pages)) && s.pages[p] != nil && s.pages[p].words[i/64%64]>>(i%64)&1 != 0
}

func (s *slotSet) add(i int64) {
	if s.has(i) {
		return
	}
	p := i / pageSlots
	for int64(len(s.pages)) <= p {
		s.pages = append(s.pages, nil)
		if len(s.top)*64 < len(s.pages) {
			s.top = append(s.top, 0)
		}
	}
	if s.pages[p] == nil {
		s.pages[p] = new(setPage)
	}
	page := s.pages[p]
	page.words[i/64%64] |= 1 << (i % 64)
	page.sum |= 1 << (i / 64 % 64)
	s.top[p/64] |= 1 << (p % 64)
	s.n++
}

func (s *slotSet) remove(i int64) {
	if !s.has(i) {
		return
	}
	p := i / pageSlots
	page := s.pages[p]
	s.n--
	if page.words[i/64%64] &^= 1 << (i % 64); page.words[i/64%64] != 0 {
		return
	}
	if page.sum &^= 1 << (i / 64 % 64); page.sum != 0 {
		return
	}
	s.top[p/64] &^= 1 << (p % 64)
}

// next returns the lowest member that is at least i.
func (s *slotSet) next(i int64) (int64, bool) {
	p := i / pageSlots
	if p < int64(len(s.pages)) && s.pages[p] != nil {
		if j, ok := s.pages[p].next(int(i % pageSlots)); ok {
			return p*pageSlots + int64(j), true
		}
	}
	p++
	for w := p / 64; w < int64(len(s.top)); w++ {
		word := s.top[w]
		if w == p/64 {
			word &= ^uint64(0) << (p % 64)
		}
		if word != 0 {
			p = w*64 + int64(bits.TrailingZeros64(word))
			j, _ := s.pages[p].next(0)
			return p*pageSlots + int64(j), true
		}
	}
	return 0, false
}

func (p *setPage) next(i int) (int, bool) {
	if word := p.words[i/64] >> (i % 64); word != 0 {
		return i + bits.TrailingZeros64(word), true
	}
	sum := p.sum & (^uint64(0) << (i / 64) << 1)
	if sum == 0 {
		return 0, false
	}
	w := bits.TrailingZeros64(sum)
	return w*64 + bits.TrailingZeros64(p.words[w]), true
}

// run says how many members follow each other from i on, at most limit.
func (s *slotSet) run(i int64, limit int) int {
	n := 0
	for n < limit && s.has(i+int64(n)) {
		n++
	}
	return n
}

// findRun returns the first run of want members among the first few runs, or
// else the longest of those. n is 0 if the set is empty.
func (s *slotSet) findRun(want int) (start int64, n int) {
	at, ok := s.next(0)
	for tries := 0; ok && tries < 8 && n < want; tries++ {
		m := s.run(at, want)
		if m > n {
			start, n = at, m
		}
		at, ok = s.next(at + int64(m))
	}
	return start, n
}

// findUnit returns the start of a whole unit of members, near the lowest ones.
func (s *slotSet) findUnit() (int64, bool) {
	at, ok := s.next(0)
	for tries := 0; ok && tries < 64; tries++ {
		at = (at + unitSlots - 1) / unitSlots * unitSlots
		if s.run(at, unitSlots) == unitSlots {
			return at, true
		}
		at, ok = s.next(at + unitSlots)
	}
	return 0, false
}
