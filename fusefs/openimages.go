// Which images are open.

package fusefs

import "sync"

// openImages are the images that are open. A kernel whose connection is cut
// sends no release, and an image in use cannot be destroyed.
type openImages struct {
	mu   sync.Mutex
	uses map[*use]struct{}
}

// use is what an open file holds of its image.
type use struct {
	open  *openImages
	image Image
}

// acquire says that a file of image is open, until the use is released. It fails
// as Image.Acquire does.
func (o *openImages) acquire(image Image) (*use, error) {
	if err := image.Acquire(); err != nil {
		return nil, err
	}
	u := &use{o, image}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.uses[u] = struct{}{}
	return u, nil
}

func (u *use) release() {
	u.open.mu.Lock()
	delete(u.open.uses, u)
	u.open.mu.Unlock()
	u.image.Release()
}

// releaseAll releases what is still open once nothing is served any more.
func (o *openImages) releaseAll() {
	for u := range o.uses {
		u.image.Release()
	}
	clear(o.uses)
}
