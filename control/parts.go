// Parts of the snapstore: adding them while snapshots are open.

package control

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"

	"blksnap/store"
)

// addPart adds a part to the snapstore, the least preferred so far.
func (d *Daemon) addPart(ctx context.Context, q PartRequest) (any, error) {
	spec, err := store.ParseSpec(q.Spec)
	if err != nil {
		return nil, refuse(syscall.EINVAL, "%v", err)
	}
	if spec.Path != "" && !filepath.IsAbs(spec.Path) {
		return nil, refuse(syscall.EINVAL, "path %q of the snapstore is not absolute", clip(spec.Path))
	}
	d.changing.Lock()
	defer d.changing.Unlock()
	if d.isStopping() {
		return nil, errStopping()
	}
	if spec.Path != "" {
		for _, dev := range d.sortedDevices() {
			if sameStorage(spec.Path, dev.Origin()) {
				return nil, refuse(syscall.EBUSY, "snapstore %s is the origin of device %s", spec, dev.Name())
			}
		}
		for _, p := range d.pool.Parts() {
			if sameStorage(spec.Path, p.Spec.Path) {
				return nil, refuse(syscall.EEXIST, "snapstore %s is one of its parts already", spec)
			}
		}
		if err := checkGround(ctx, "snapstore", spec.Path, d.probeHeld); err != nil {
			return nil, err
		}
	}
	part, err := store.Open(spec, q.Force)
	if err != nil {
		return nil, err
	}
	if err := d.join(part); err != nil {
		return nil, errors.Join(err, part.Close())
	}
	d.record("store-added", "", "", fmt.Sprintf("%s, %s", spec, people(part.Traits().Limit)))
	return nil, nil
}

// join puts a part into the pool, under a number that the next start knows before
// the first slot of it is given out.
func (d *Daemon) join(part store.Part) error {
	d.mu.Lock()
	no, err := d.members.claim(part, true)
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if err := d.writeMembers(); err != nil {
		return fmt.Errorf("note part %d of the snapstore: %w", no, err)
	}
	return d.pool.AddAs(no, part)
}
