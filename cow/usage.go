// How much of the snapstore an image takes.

package cow

import (
	"math/bits"
	"slices"
)

// Holds is how many bytes of the snapstore would come back if only this image were
// destroyed: what it finds in its own layers and no older image would need there,
// and what was written to it. It is 0 once the image is destroyed or lost.
func (i *Image) Holds() (n int64) {
	i.device.always(func() { n = i.holds() })
	return n
}

func (i *Image) holds() int64 {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	own, older := i.ownLayers()
	switch {
	case own == nil:
		return 0
	case i.overlay == nil:
		return preservedFor(own, older)
	}
	return preservedFor(own, older) + i.overlay.bytes()
}

// preservedFor is how many bytes only the image needs that has the layers own. older is
// what ownLayers returns.
func preservedFor(own []*layer, older *shield) int64 {
	var blocks int
	for _, l := range own {
		for c, w := range l.table.from(0) {
			if !w.hasSlot() {
				continue
			}
			mask := w.mask()
			if older != nil {
				mask &= older.mask(c)
			}
			blocks += bits.OnesCount16(mask)
		}
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
	own, older := i.ownLayers()
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

// ownLayers returns the image's layer and the nameless ones that follow, which no newer
// healthy image needs: a head, or what was not folded yet. older is, as a shield, the
// layers from the next older healthy image's to the one before own, nil where there is
// none. Both are nil where the image is not healthy. The caller is inside readers.
func (i *Image) ownLayers() (own []*layer, older *shield) {
	d := i.device
	d.mu.Lock()
	defer d.mu.Unlock()
	first := slices.Index(d.layers, i.layer)
	if i.layer.image != i || first < 0 {
		return nil, nil
	}
	end := first + 1
	for end < len(d.layers) && d.layers[end].image == nil {
		end++
	}
	for from := first - 1; from >= 0; from-- {
		if o := d.layers[from].image; o != nil {
			older = &shield{slices.Clone(d.layers[from:first]), o.size}
			break
		}
	}
	return slices.Clone(d.layers[first:end]), older
}
