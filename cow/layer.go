// Layers: what was preserved while one snapshot was the device's newest.

package cow

import "sync/atomic"

// layer holds what was preserved from the instant of one snapshot to that of
// the next. Only a device's newest layer, the head, gains words.
type layer struct {
	table *table

	// newer is the next layer, nil for the head.
	newer atomic.Pointer[layer]

	// image is the image whose instant the layer begins with, nil once it was
	// destroyed or is broken. Protected by Device.mu.
	image *Image
}

// shield is what a writer looks at to see whether a block still has to be
// preserved: the layers from the newest healthy image's to the head. It never
// changes; a device replaces it by another.
//
// Whether an older image finds the block is no question: its chain ends with
// these layers.
type shield struct {
	layers []*layer // never empty; the last is the head
}

func (s *shield) head() *layer { return s.layers[len(s.layers)-1] }

// mask is which blocks of c are preserved. Newer layers are asked first: a word
// that is folded into an older layer appears there before it goes from the newer
// one, so it is seen in one of the two.
func (s *shield) mask(c chunkNo) uint16 {
	var m uint16
	for i := len(s.layers) - 1; i >= 0 && m != allBlocks; i-- {
		m |= s.layers[i].table.load(c).mask()
	}
	return m
}

// covers says whether every block that [off, off+n) touches is preserved.
func (s *shield) covers(off, n int64) bool {
	for sp := range spans(off, n) {
		if m := sp.mask(); m&^s.mask(sp.chunk) != 0 {
			return false
		}
	}
	return true
}
