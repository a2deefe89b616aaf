// How much of the snapstore an image takes.

package cow

import (
	"math/bits"
	"slices"
)

// Holds is how many bytes of the snapstore would come back if only this image were
// destroyed: what it finds in its own layer and no older image would need there,
// and what was written to it. It is 0 once the image is destroyed or lost.
func (i *Image) Holds() (n int64) {
	i.device.always(func() { n = i.holds() })
	return n
}

func (i *Image) holds() int64 {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	own, older := i.ownLayer()
	switch {
	case own == nil:
		return 0
	case i.overlay == nil:
		return preservedFor(own, older)
	}
	return preservedFor(own, older) + i.overlay.bytes()
}

// preservedFor is how many bytes only the image needs that the layer own begins
// with. older is what ownLayer returns.
func preservedFor(own *layer, older *shield) int64 {
	var blocks int
	for c, w := range own.table.from(0) {
		if !w.hasSlot() {
			continue
		}
		mask := w.mask()
		if older != nil {
			mask &= older.mask(c)
		}
		blocks += bits.OnesCount16(mask)
	}
	return int64(blocks) * blockSize
}

// Shares is how many bytes of the snapstore the image reads that would stay
// without it, because other images need them.
func (i *Image) Shares() (n int64) {
	i.device.always(func() { n = i.shares() })
	return n
}

func (i *Image) shares() int64 {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	own, older := i.ownLayer()
	if own == nil {
		return 0
	}
	chain := i.chain(nil, nil)
	var blocks int64
	for c := range preserved(chain, 0, chunks(i.Size())) {
		var places [blocksPerChunk]place
		locate(chain, places[:], c.off(), chunkSize)
		for _, p := range places {
			if p > isZero {
				blocks++
			}
		}
	}
	return max(0, blocks*blockSize-preservedFor(own, older))
}

// ownLayer returns the image's layer and, as a shield, the layers from the next
// older healthy image's to the one before it, nil where there is none; nothing
// where the image is not healthy. The caller is inside readers.
func (i *Image) ownLayer() (own *layer, older *shield) {
	d := i.device
	d.mu.Lock()
	defer d.mu.Unlock()
	if i.layer.image != i {
		return nil, nil
	}
	from := -1
	for n, l := range d.layers {
		if l == i.layer {
			if from >= 0 {
				older = &shield{slices.Clone(d.layers[from:n]), d.layers[from].image.size}
			}
			return l, older
		}
		if l.image != nil {
			from = n
		}
	}
	return nil, nil
}
