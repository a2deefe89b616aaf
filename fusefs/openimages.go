// Which images are open.

package fusefs

import "sync"

// openImages are the images that are open. A kernel whose connection is cut
// sends no release, and an image in use cannot be destroyed.
type openImages struct {
	mu      sync.Mutex
	handles map[*imageHandle]struct{}
}

func (o *openImages) add(h *imageHandle) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.handles[h] = struct{}{}
}

func (o *openImages) remove(h *imageHandle) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.handles, h)
}

// releaseAll releases what is still open once nothing is served any more.
func (o *openImages) releaseAll() {
	for h := range o.handles {
		h.file.image.Release()
	}
	clear(o.handles)
}
