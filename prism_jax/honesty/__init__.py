"""The honesty panel: does the discriminator look at the picture?"""
