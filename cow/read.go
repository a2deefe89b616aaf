// Reading an image.
//
// A block of an image is in the first of these that has it: the image's overlay
// (overlay.go), its layer, newer layers in order up to the head, the origin. While it is read it can move
// to the left: a writer preserves it, or the reclaimer folds its layer into an
// older one. What a reader found in the origin may thus be newer than the image
// when it comes to read it; but then the block was published further left before.
// So a reader looks up where the blocks are, reads them, and looks up again:
// blocks that are still where they were were right, the others are read once more.
//
// A look goes through the layers from right to left, and what it finds last
// counts. In the other direction a block could move past it, from a layer that it
// has not come to into one that it has left: it would find the block nowhere, and
// take it for one that is in the origin.
//
// Slots and tables that a reader may have found are not given back while it is
// inside Device.readers.

package cow

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"blksnap/store"
)

// place says where a block of an image is.
type place uint64

const (
	inOrigin place = 0
	isZero   place = 1
	nowhere  place = 1<<64 - 1 // of a block that was not looked for yet
	// Any other is a block in a slot: slot * blocksPerChunk + block, so that
	// blocks that are neighbours in the snapstore have places that are.
)

func placeIn(s store.Slot, block int) place {
	return place(s)*blocksPerChunk + place(block)
}

// follows says whether q is where the block after that at p would be read along
// with it.
func (p place) follows(q place) bool {
	if p <= isZero {
		return q == p
	}
	return q == p+1
}

// readWindow is how many bytes are looked up at a time.
const readWindow = 1 << 20

// lookup is room for the places of a window, which need not begin at a block, and
// for the tables that have them.
type lookup struct {
	was, is [readWindow>>blockShift + 1]place
	chain   []*table
}

var lookups = sync.Pool{New: func() any { return new(lookup) }}

// Read fills p with the image's bytes from off on, which lie within Size. It
// fails where the image is destroyed or lost, also if that happens meanwhile, and
// where the origin or the snapstore fails.
func (i *Image) Read(p []byte, off int64) error {
	return i.guarded(func() error { return i.readThrough(i.overlay, p, off) })
}

// readThrough is Read with the given overlay; without one it reads what the device
// held at the instant.
func (i *Image) readThrough(o *overlay, p []byte, off int64) error {
	g, _ := i.device.readers.tryEnter() // never shut
	defer i.device.readers.leave(g)
	// Only inside is it certain that the layers of a healthy image stay.
	if err := i.Err(); err != nil {
		return err
	}
	l := lookups.Get().(*lookup)
	defer lookups.Put(l)
	for len(p) > 0 {
		n := min(len(p), readWindow)
		if err := i.read(o, l, p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	// Only now ask whether the image is still good: a write that could not
	// preserve a block broke the image before it changed the block.
	return i.Err()
}

func (i *Image) read(o *overlay, l *lookup, p []byte, off int64) error {
	first := off >> blockShift
	n := int((off+int64(len(p))-1)>>blockShift-first) + 1
	was, is := l.was[:n], l.is[:n]
	for b := range was {
		was[b] = nowhere
	}
	for {
		// Each time, because there may be a new layer, with blocks that were
		// overwritten meanwhile.
		l.chain = i.chain(o, l.chain[:0])
		locate(l.chain, is, off, int64(len(p)))
		again := false
		for b := 0; b < n; {
			if is[b] == was[b] {
				b++
				continue
			}
			end := b + 1
			for end < n && is[end] != was[end] && is[end-1].follows(is[end]) {
				end++
			}
			if err := i.readRun(p, off, first+int64(b), first+int64(end), is[b]); err != nil {
				return err
			}
			again = true
			b = end
		}
		if !again {
			return nil
		}
		was, is = is, was
	}
}

// readRun reads blocks [b, end), the first of which is at pl, as far as p holds
// them; p begins at byte off of the image.
func (i *Image) readRun(p []byte, off, b, end int64, pl place) error {
	from, to := max(b<<blockShift, off), min(end<<blockShift, off+int64(len(p)))
	part := p[from-off : to-off]
	switch pl {
	case isZero:
		clear(part)
		return nil
	case inOrigin:
		err := i.device.Read(part, from)
		if err != nil {
			// Where the device was cut, the image will break in a moment.
			err = cmp.Or(i.device.within("read", from, int64(len(part)), syscall.EIO), err)
		}
		return err
	}
	s, block := store.Slot(pl/blocksPerChunk), int64(pl%blocksPerChunk)
	if err := i.device.pool.ReadAt(s, part, block<<blockShift+from-b<<blockShift); err != nil {
		err = fmt.Errorf("read snapstore: %w", err)
		i.device.breakImage(i, failed(err.Error()), err)
		return i.Err()
	}
	return nil
}

// chain appends the tables that the image's blocks may be in: the overlay's, where
// one is given, those of the layers from its own to the head. They stay while the
// caller is inside Device.readers.
func (i *Image) chain(o *overlay, tables []*table) []*table {
	if o != nil {
		tables = append(tables, o.table)
	}
	for l := i.layer; l != nil; l = l.newer.Load() {
		tables = append(tables, l.table)
	}
	return tables
}

// locate finds the places of the blocks that [off, off+n) touches.
func locate(chain []*table, places []place, off, n int64) {
	clear(places) // all inOrigin
	first := off >> blockShift
	for sp := range spans(off, n) {
		at := int64(sp.chunk)*blocksPerChunk - first // of the chunk's first block in places
		want := sp.mask()
		for _, t := range slices.Backward(chain) {
			w := t.load(sp.chunk)
			for b, blocks := range runs(w.mask() & want) {
				for k := b; k < b+blocks; k++ {
					if w.hasSlot() {
						places[at+int64(k)] = placeIn(w.slot(), k)
					} else {
						places[at+int64(k)] = isZero
					}
				}
			}
		}
	}
}
