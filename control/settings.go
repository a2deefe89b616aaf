// From what serve was told to what it does: defaults, paths, devices.

package control

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"blksnap/store"
)

// settings is a Config with everything filled in and looked at, before
// anything is opened.
type settings struct {
	mount        string // "" for none
	mountDefault bool   // nobody asked for this one: it may be created
	run, state   string
	listen       []string
	control      string
	stores       []store.Spec
	devices      []DeviceRequest
	allowOther   bool
	tls          *tls.Config // nil for none

	allowPlaintext bool // also to other machines
	onStoreLow     string
	idleTimeout    time.Duration // 0: none
	force          bool

	private string // directory to remove at the end, "" for none
	base    string // directory of ours to make before those in it, "" for none
}

// settle fills in what c leaves open. passed says that listening sockets were
// passed in.
//
// A program that runs us for a moment, as libnbd does, passes a socket and wants
// nothing of us to be found by others or to stay: run and state are then in a
// private directory, which is created, and no default configuration is read.
func settle(c Config, passed bool) (s settings, err error) {
	moment := passed && c.Run == "" && c.State == "" && os.Getenv("NOTIFY_SOCKET") == ""
	if !moment || c.File != "" {
		if c, err = c.withFile(); err != nil {
			return s, err
		}
	}
	s.allowOther, s.force, s.allowPlaintext = given(c.AllowOther), given(c.Force), given(c.AllowPlaintext)
	s.onStoreLow = given(c.OnStoreLow)
	if s.idleTimeout = given(c.IdleTimeout); s.idleTimeout < 0 {
		return s, refuse(syscall.EINVAL, "idle timeout %v: must not be negative", s.idleTimeout)
	}
	if s.tls, err = loadTLS(c.TLSCerts); err != nil {
		return s, err
	}
	if err := s.settleDevices(c); err != nil {
		return s, err
	}
	if moment && c.Run == "" && c.State == "" {
		if s.private, err = os.MkdirTemp("", "blksnap-"); err != nil {
			return s, fmt.Errorf("create private directory: %w", err)
		}
		defer func() {
			if err != nil {
				os.RemoveAll(s.private)
			}
		}()
		c.Run, c.State = filepath.Join(s.private, "run"), filepath.Join(s.private, "state")
	}
	if err = s.settlePlaces(c); err == nil {
		err = s.settleStores(c)
	}
	return s, err
}

// settlePlaces fills in directories and sockets.
func (s *settings) settlePlaces(c Config) error {
	p := defaultPlaces()
	s.run, s.state, s.mount = cmp.Or(c.Run, p.run), cmp.Or(c.State, p.state), cmp.Or(c.Mount, p.mount)
	s.mountDefault = c.Mount == ""
	s.control = cmp.Or(c.Control, filepath.Join(s.run, controlSocket))
	for _, path := range []*string{&s.run, &s.state, &s.mount, &s.control} {
		if path == &s.mount && s.mount == "none" {
			s.mount = ""
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return fmt.Errorf("find %s: %w", *path, err)
		}
		*path = abs
	}
	for _, path := range []string{s.run, s.state, s.mount} {
		if p.base != "" && strings.HasPrefix(path, p.base+"/") {
			s.base = p.base
		}
	}
	for _, uri := range c.Listen {
		if path, ok := strings.CutPrefix(uri, "unix://"); ok && path != "" {
			abs, err := filepath.Abs(path)
			if err != nil {
				return fmt.Errorf("find %s: %w", uri, err)
			}
			uri = "unix://" + abs
		}
		s.listen = append(s.listen, uri)
	}
	if len(s.listen) == 0 {
		s.listen = []string{"unix://" + filepath.Join(s.run, nbdSocket)}
	}
	return nil
}

// settleDevices reads the origins. Two of one name are refused here, before
// anything is opened.
func (s *settings) settleDevices(c Config) error {
	if err := c.DeviceConfig.check(); err != nil {
		return err
	}
	seen := map[string]string{}
	for _, arg := range c.Origin {
		name, origin, err := splitOrigin(arg)
		if err != nil {
			return err
		}
		if other, ok := seen[name]; ok {
			return refuse(syscall.EEXIST, "origins %s and %s are both named %s: write NAME=%s", other, origin, name, origin)
		}
		seen[name] = origin
		s.devices = append(s.devices, DeviceRequest{name, origin, c.DeviceConfig})
	}
	return nil
}

// settleStores reads the parts of the snapstore.
func (s *settings) settleStores(c Config) error {
	specs := c.Store
	if len(specs) == 0 {
		specs = []string{"file:" + filepath.Join(s.state, "snapstore")}
	}
	for _, text := range specs {
		spec, err := store.ParseSpec(text)
		if err != nil {
			return err
		}
		if spec.Path != "" {
			if spec.Path, err = filepath.Abs(spec.Path); err != nil {
				return fmt.Errorf("find snapstore: %w", err)
			}
		}
		s.stores = append(s.stores, spec)
	}
	return nil
}

// checkOrigins refuses a part of the snapstore that is an origin: with --force it would be
// overwritten.
func (s *settings) checkOrigins(part store.Spec) error {
	for _, d := range s.devices {
		if part.Path == d.Origin || sameStorage(part.Path, d.Origin) {
			return refuse(syscall.EBUSY, "snapstore %s is the origin of device %s", part, d.Name)
		}
	}
	return nil
}

// makeDirs creates the directories but the state directory and refuses those that stand on
// what we are about to serve: see ground.go.
func (s *settings) makeDirs(ctx context.Context) error {
	if err := s.checkGrounds(ctx); err != nil {
		return err
	}
	for _, dir := range []string{s.base, s.run} {
		if dir == "" {
			continue
		}
		if err := makePrivate(dir); err != nil {
			return err
		}
	}
	return nil
}

func (s *settings) checkGrounds(ctx context.Context) error {
	if err := checkGround(ctx, "run directory", s.run, probeRead); err != nil {
		return err
	}
	const log = "/proc/self/fd/2"
	if st, err := os.Stat(log); err != nil || !st.Mode().IsRegular() {
		return nil // no file
	}
	return checkGround(ctx, "log", log, probeRead)
}
