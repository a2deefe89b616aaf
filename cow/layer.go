// Layers: what was preserved while one snapshot was the device's newest.

package cow

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
)

// layer holds what was preserved from the instant of one snapshot to that of
// the next. Only a device's newest layer, the head, gains words.
type layer struct {
	number uint64 // ascending in a device
	table  *table // its memory begins with the layer's header

	// newer is the next layer, nil for the head.
	newer atomic.Pointer[layer]

	// image is the image whose instant the layer begins with, nil once it was
	// destroyed or is broken. Protected by Device.mu.
	image *Image
}

// layerPath is where a device keeps the layer of a number, or what name says is
// kept under its number; empty where it keeps nothing.
func layerPath(dir, name string, number uint64) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(dir, fmt.Sprintf(name, number))
}

// openState opens a file of ours to be read. Whatever stands there instead is an
// error, now or when it is read: a FIFO, whose writer would be waited for, too.
func openState(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

const (
	layerName   = "layer-%d"
	overlayName = "overlay-%d"
)

// newLayer makes an empty layer for a device whose state is in dir.
func newLayer(dir string, h layerHeader) (*layer, error) {
	t, err := openTable(layerPath(dir, layerName, h.number), chunks(h.size))
	if err != nil {
		return nil, err
	}
	h.encode(t.header(), layerMagic)
	return &layer{number: h.number, table: t}, nil
}

// openLayer opens a layer that a predecessor left.
func openLayer(dir string, number uint64) (*layer, error) {
	t, err := findTable(layerPath(dir, layerName, number), layerMagic, number)
	if err != nil {
		return nil, err
	}
	return &layer{number: number, table: t}, nil
}

// findTable opens a table with a layer's header, and the magic, that a predecessor
// left under a number.
func findTable(path, magic string, number uint64) (*table, error) {
	f, err := openState(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	switch {
	case err != nil:
		return nil, err
	case size == 0:
		return nil, errBlank
	case size%memoryStep != 0: // it only grows, and by whole steps
		return nil, fmt.Errorf("%w: layer %d is cut short, to %d bytes", ErrDamaged, number, size)
	}
	var b [tableHeader]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return nil, err
	}
	h, err := decodeLayerHeader(b[:], magic)
	if err != nil {
		return nil, err
	}
	if h.number != number || h.size <= 0 {
		return nil, fmt.Errorf("%w: layer %d of %d bytes", ErrDamaged, h.number, h.size)
	}
	t, err := openTable(path, chunks(h.size))
	if err != nil {
		return nil, err
	}
	if t.spent() {
		return t, nil // nobody looks at its words
	}
	if err := t.verify(); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// header is what the layer was made with.
func (l *layer) header() layerHeader {
	h, _ := decodeLayerHeader(l.table.header(), layerMagic)
	return h
}

// setCBT notes the image's number, which is known only at the instant.
func (l *layer) setCBT(number uint64) {
	wordAt(l.table.header(), layerCBT).Store(number)
	if t := l.table; t.register != nil {
		t.register.setCBT(t.entry, number)
	}
}

func (l *layer) cbt() uint64 { return wordAt(l.table.header(), layerCBT).Load() }

// commit notes that the layer's snapshot was live.
func (l *layer) commit() { wordAt(l.table.header(), layerCommitted).Store(1) }

func (l *layer) committed() bool { return wordAt(l.table.header(), layerCommitted).Load() == 1 }

// setRollback notes how far the device is being rolled back to the layer's image.
func (l *layer) setRollback(n uint64) { wordAt(l.table.header(), layerRollback).Store(n) }

// rollback is what setRollback noted.
func (l *layer) rollback() uint64 { return wordAt(l.table.header(), layerRollback).Load() }

// setFault notes why the layer's image has no health any more. One caller at a
// time.
func (l *layer) setFault(kind uint64, reason string) {
	b := l.table.header()
	n := copy(b[layerReason+8:layerReason+8+layerReasonBytes], reason)
	wordAt(b, layerReason).Store(uint64(n))
	wordAt(b, layerFault).Store(kind)
}

// fault is what setFault noted.
func (l *layer) fault() (kind uint64, reason string) {
	b := l.table.header()
	n := min(wordAt(b, layerReason).Load(), layerReasonBytes)
	return wordAt(b, layerFault).Load(), string(b[layerReason+8:][:n])
}

// shield is what a writer looks at to see whether a block still has to be
// preserved: the layers from the newest healthy image's to the head, and where
// that image ends. It never changes; a device replaces it by another.
//
// Whether an older image finds the block is no question: its chain ends with
// these layers. Nor is what older images have beyond the newest one's end: it was
// cut from the origin before, and they find it in older layers (resize.go).
type shield struct {
	layers []*layer // never empty; the last is the head
	end    int64
}

func (s *shield) head() *layer { return s.layers[len(s.layers)-1] }

// mask is which blocks of c need not be preserved any more. Newer layers are asked
// first: a word that is folded into an older layer appears there before it goes
// from the newer one, so it is seen in one of the two.
func (s *shield) mask(c chunkNo) uint16 {
	m := c.beyond(s.end)
	for i := len(s.layers) - 1; i >= 0 && m != allBlocks; i-- {
		m |= s.layers[i].table.load(c).mask()
	}
	return m
}

// covers says whether nothing that [off, off+n) touches has to be preserved.
func (s *shield) covers(off, n int64) bool {
	for sp := range spans(off, n) {
		if m := sp.mask(); m&^s.mask(sp.chunk) != 0 {
			return false
		}
	}
	return true
}
